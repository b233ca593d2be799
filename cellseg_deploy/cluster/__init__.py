"""A folder run whose images are done by workers of a Dask cluster; see ``engine``."""
