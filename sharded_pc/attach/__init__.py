"""How a guest gets the RAM: the attach protocol, its server and its Python client."""
