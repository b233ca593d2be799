"""The files that a network is deployed as, one module per form."""
