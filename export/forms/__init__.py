"""The files that a network is deployed as, one module a form."""
