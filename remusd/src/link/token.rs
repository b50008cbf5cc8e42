//! Who decides when one side of a protection has lost the other (DESIGN section 3, hazard F19).

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::witness::RecordKey;

/// The mode of a protection, agreed by both sides and durable on both before it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Token {
    /// The primary's: it goes on alone when it loses the backup, the backup claims nothing. Without a witness, and while a
    /// configured one is known to be down.
    #[default]
    Primary,
    /// The witness's: whoever wants to go on without the other has to win exactly this record.
    Witness(RecordKey),
}

impl Token {
    /// The record that decides, if one does.
    #[must_use]
    pub fn record(self) -> Option<RecordKey> {
        match self {
            Self::Primary => None,
            Self::Witness(key) => Some(key),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary => f.write_str("primary"),
            Self::Witness(key) => write!(f, "witness (record generation {})", key.generation),
        }
    }
}
