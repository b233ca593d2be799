"""What the page of ``cellseg-view`` and the service ``cellseg-serve`` share: who may call, bodies with a limit, errors
as answers, and the start of the server. Uvicorn is imported in the function that starts it."""
