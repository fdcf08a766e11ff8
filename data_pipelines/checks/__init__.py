"""What `python -m data_pipelines.check` looks at: labels, media, the folder; and how it is told."""
