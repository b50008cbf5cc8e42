//! What happens to the kernel's queues behind our back.

use serde::{Deserialize, Serialize};

/// Something remusd has to know about. Values only; no answer is expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum NetEvent {
    /// The intermediate device went down, or its queue length changed: the kernel emptied the queue, and left
    /// its counters lying. The qdisc was replaced by a new one. Held output is lost, as on a bad network;
    /// nothing leaked.
    Reset {
        /// The guest's interface.
        vif: String,
        /// What was noticed.
        what: String,
    },
    /// Packets did not fit under the limit.
    Dropped {
        /// The guest's interface.
        vif: String,
        /// How many since the last such event.
        packets: u64,
        /// How many since set-up.
        total: u64,
    },
    /// An interface disappeared. Without its intermediate device a guest's interface sends nothing any more.
    Gone {
        /// The guest's interface.
        vif: String,
        /// Which one disappeared: itself, or the intermediate device.
        name: String,
    },
    /// Somebody else changed or removed a queue or filter of ours. It was put back.
    Foreign {
        /// The guest's interface.
        vif: String,
        /// What was changed.
        what: String,
        /// Whether output that was not acknowledged may have left meanwhile. Then the backup's copy is not
        /// one that the world can be told to go on with.
        leaked: bool,
        /// Why it could not be put back, if it could not.
        failed: Option<String>,
    },
    /// An interface with the name of one of the guest's has appeared. It is sealed: protect again.
    Appeared {
        /// The guest's interface.
        vif: String,
        /// Why it could not be sealed, if it could not.
        failed: Option<String>,
    },
}
