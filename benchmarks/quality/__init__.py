"""What a form, a setting or a disturbance costs in cells."""
