"""Effects of forms, settings and disturbances on the cells found."""
