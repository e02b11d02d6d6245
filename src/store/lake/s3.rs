//! The lake on aws-sdk-s3.
