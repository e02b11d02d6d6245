//! Contents copied out of a commit: get and cat.
