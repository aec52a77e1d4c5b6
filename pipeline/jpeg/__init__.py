"""Region-addressable JPEGs: baseline JPEGs with restart markers and a table of segment lengths, so that a region can be decoded
without the rest of the image.

- `region`: the definition of the format, and cutting out a region as a JPEG of its own.
- `transcode`: writes the format from baseline JPEGs, losslessly.
- `entropy`, `huffman`: the entropy coding and its Huffman tables.
- `scans`, `arithmetic`, `blocks`: the coefficients of JPEGs that are not one Huffman-coded scan.
- `decode`: decodes a region to pixels. `idct`: its inverse DCT, chroma upsampling and color conversion.
"""
