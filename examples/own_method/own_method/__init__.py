"""A method and an encoder for avcil-dist."""
