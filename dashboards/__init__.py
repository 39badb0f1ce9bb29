"""The web pages of ``headscope dash``."""
