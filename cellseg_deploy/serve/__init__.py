"""Count cells over HTTP.

    request --settings--> Task --engine--> Segmentation --outputs--> JSON, GeoJSON, label image, overlay

``engine`` runs the tiles of all requests in shared batches; ``settings`` and ``outputs`` say what may be asked for;
``service`` maps requests to them and knows no web framework; ``app`` is the only module that imports Starlette;
``openapi`` describes it all; ``client`` asks it.
"""
