"""A codebook on disk: labels in the bits that they need (``packing``) or deserve (``entropy_coding``), the tensors of a
``packed_codebook``, and ``compression``, an account of what it saves."""
