//! The embedded lake: an S3 server over a local directory.
