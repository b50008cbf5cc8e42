//! What one epoch cost: the primary's report (times in microseconds).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::Epoch;

/// Durations and sizes of one epoch. All durations are in microseconds of this host's monotonic clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochReport {
    /// Which epoch.
    pub epoch: Epoch,
    /// Whether output was held for it.
    pub armed: bool,
    /// From the suspend request to the guest standing still: the guest's own freeze is in here.
    pub suspend_us: u64,
    /// Devices' postsuspend and the engine's copy.
    pub capture_us: u64,
    /// Of [`capture_us`](Self::capture_us): devices' postsuspend, and the device model's state.
    #[serde(default)]
    pub postsuspend_us: u64,
    /// Of [`capture_us`](Self::capture_us): finding the dirty pages. The native engine's, as the next two.
    #[serde(default)]
    pub log_us: Option<u64>,
    /// Of [`capture_us`](Self::capture_us): copying them.
    #[serde(default)]
    pub copy_us: Option<u64>,
    /// Of [`capture_us`](Self::capture_us): reading vCPU and platform state.
    #[serde(default)]
    pub state_us: Option<u64>,
    /// Devices' preresume and the resume call.
    pub resume_us: u64,
    /// Of [`resume_us`](Self::resume_us): devices' preresume.
    #[serde(default)]
    pub preresume_us: u64,
    /// Turning captured pages into frames.
    pub encode_us: u64,
    /// From the guest's resume until the last byte was handed to the transport.
    pub send_us: u64,
    /// From then to the acknowledgement.
    pub ack_us: u64,
    /// Devices' commit.
    pub commit_us: u64,
    /// Dirty pages in the epoch.
    pub pages: u64,
    /// Bytes of frames for it.
    pub bytes: u64,
}

impl EpochReport {
    /// How long the guest stood still as the primary sees it: from suspended to resumed.
    #[must_use]
    pub fn paused_us(&self) -> u64 {
        self.capture_us + self.resume_us
    }
}

impl fmt::Display for EpochReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: u64| us as f64 / 1000.0;
        let part = |us: Option<u64>, what: &str| us.map_or(String::new(), |us| format!(" {what} {:.1}", ms(us)));
        write!(
            f,
            "epoch {}{}: {} pages, {} KiB, suspend {:.1} capture {:.1} (postsuspend {:.1}{}{}{}) resume {:.1} (preresume {:.1}) encode {:.1} \
             send {:.1} ack {:.1} commit {:.1} ms",
            self.epoch,
            if self.armed { "" } else { " (unarmed)" },
            self.pages,
            self.bytes / 1024,
            ms(self.suspend_us),
            ms(self.capture_us),
            ms(self.postsuspend_us),
            part(self.log_us, "log"),
            part(self.copy_us, "copy"),
            part(self.state_us, "state"),
            ms(self.resume_us),
            ms(self.preresume_us),
            ms(self.encode_us),
            ms(self.send_us),
            ms(self.ack_us),
            ms(self.commit_us)
        )
    }
}
