"""From labelled images to shards.

`sources` and `tars` list the images to convert, `conversion` divides them into shard tasks (`task`), and `run` runs these on this
machine or on Ray. `images` decides how an image is stored, `statistics` computes the mean image and the colour covariance, and
`report` says what was found. `beton` writes FFCV files, `verify` re-reads everything. `make` puts it all together.
"""
