//! Fetching: contents of packs, verified, from memory, the tier, what is in flight, or the lake.
