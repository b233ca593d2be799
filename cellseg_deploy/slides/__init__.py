"""One image that is larger than memory: regions in, labels, tables and an overview out."""
