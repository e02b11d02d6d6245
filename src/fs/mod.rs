//! The mounted view of a commit.
