"""Several jobs of the pipeline in one process: `ham batch`."""
