"""What remembers: the page allocator `PagedKVCache` and `CacheView`, the sequences of it that a model's step works on."""
