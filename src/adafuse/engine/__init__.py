"""How a token is decoded: the decode loop, and the runtimes that launch it."""
