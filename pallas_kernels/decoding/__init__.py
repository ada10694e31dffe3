"""What `decode_attention` and `paged_decode` share."""
