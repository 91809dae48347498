"""How each kind of file is cut into blocks, and how a block's rows are read."""
