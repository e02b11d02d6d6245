//! What happened to a dataset, and what its versions hold.
