"""How a token is decoded: the decode loop, and the strategies that apply the gated experts."""
