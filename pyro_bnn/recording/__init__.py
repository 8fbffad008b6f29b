"""Functions of tensors as graphs of operations: ``graph`` records, thins and replays or compiles one, and ``recorded``
decides when that is done."""
