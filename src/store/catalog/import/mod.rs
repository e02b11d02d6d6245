//! Import: a commit over objects that already lie in a bucket, without copying a byte.

pub mod keys;
