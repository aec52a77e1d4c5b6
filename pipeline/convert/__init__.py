"""From labelled images to shards.

`sources` and `tars` list what is to be converted, `conversion` divides it into shard tasks (`task`), and `run` carries these out
on this machine or on Ray. `images` decides how an image is stored, `statistics` takes the mean image and colour covariance, and
`report` says what was found. `beton` writes FFCV files, `verify` re-reads everything.
"""
