"""Tables, tasks, streams, samplers, buffers: rows with stable ids on their way into a model."""
