"""Meet other libraries: one file each, the only places that import them."""
