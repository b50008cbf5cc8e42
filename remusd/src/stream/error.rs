//! What can be wrong with a stream.

use super::item::Layer;

/// A stream that is not what Xen 4.17 writes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Another kind of data, or a damaged head.
    #[error("this is not {expected}: found {found}")]
    Magic {
        /// What should be there.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A version or feature that this program does not handle.
    #[error("the stream needs {feature}, which remusd does not support")]
    Unsupported {
        /// The version or feature.
        feature: String,
    },
    /// A record that is longer than its kind may be.
    #[error("{layer:?} record {kind:#x} of {length} bytes; at most {limit} are allowed")]
    TooLong {
        /// Which stream.
        layer: Layer,
        /// The record's type.
        kind: u32,
        /// Its length, bytes.
        length: u64,
        /// The limit, bytes.
        limit: u64,
    },
    /// A record whose body does not fit its kind.
    #[error("malformed {layer:?} record {kind:#x}: {reason}")]
    Malformed {
        /// Which stream.
        layer: Layer,
        /// The record's type.
        kind: u32,
        /// What does not fit.
        reason: String,
    },
    /// A mandatory record of unknown type.
    #[error("unknown {layer:?} record type {kind:#x}; the sender is newer than Xen 4.17")]
    Unknown {
        /// Which stream.
        layer: Layer,
        /// The record's type.
        kind: u32,
    },
    /// A known record at a place where it cannot be.
    #[error("{layer:?} record {kind:#x} {place}")]
    Misplaced {
        /// Which stream.
        layer: Layer,
        /// The record's type.
        kind: u32,
        /// Where it was.
        place: &'static str,
    },
    /// Bytes after the end.
    #[error("{0} bytes after the end of the stream")]
    Trailing(usize),
    /// The stream broke off.
    #[error("the stream ends in the middle of {within}")]
    Truncated {
        /// What was incomplete.
        within: &'static str,
    },
    /// A domain configuration that is not libxl's JSON.
    #[error("the domain configuration is not libxl's JSON: {0}")]
    Config(String),
}
