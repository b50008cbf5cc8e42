//! A mirrored disk: epoch-buffered replication on a stock kernel.

pub mod core;
