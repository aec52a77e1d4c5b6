"""From labelled images to shards.

- `make`: `make_shards`, a whole conversion, and its options. `command`: the command line.
- `sources`, `tars`, `names`: list the images to convert, their labels and the names of their classes.
- `conversion`: divides them into shard tasks; resumes and completes a conversion.
- `task`, `run`: make one shard; run many tasks on this machine or on Ray.
- `images`: checks an image and converts it to its stored form.
- `statistics`: the mean image and the RGB covariance of training crops.
- `report`: report.json, with unusable images, duplicates and other findings.
- `beton`: writes FFCV's .beton files.
- `verify`: re-reads every byte of a data set.
"""
