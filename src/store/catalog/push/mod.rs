//! Push: a directory becomes a commit.
