"""Region-addressable JPEGs: the format, its lossless transcoder, and a decoder that opens an image at the crop.

`region` defines the format and cuts regions out; `huffman` and `entropy` code coefficients; `transcode` writes the format from
baseline JPEGs; `decode` and `idct` turn a region into pixels.
"""
