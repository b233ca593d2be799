"""Look at the results of a run in a browser on this machine, and correct them.

``workspace`` holds the state (images, label images, corrections, model) and knows no web framework; ``routes`` maps
requests to it; ``app`` is the only module that imports Starlette; ``static/`` is the page.
"""
