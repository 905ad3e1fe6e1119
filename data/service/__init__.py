"""The data service: Ray actors that build the batches of a run, beside the trainers or on nodes of their own."""
