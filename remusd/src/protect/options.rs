//! What an operator may choose when protecting a domain.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::machine::{OnBackupLoss, Policy};
use crate::pair::HostId;

/// What the backup does when it has lost the primary and no witness is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum OnPrimaryLoss {
    /// Keep the copy and wait for `remus failover`: the operator asserts that the primary is off.
    #[default]
    Wait,
    /// Activate by itself. Says that two live copies are possible: a cut link alone brings them about.
    Activate,
}

/// What captures the guest (DESIGN section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// Xen's own `libxl-save-helper`, a process of its own.
    #[default]
    SaveHelper,
    /// remusd itself: shorter pauses. PVH and HVM guests.
    Native,
}

/// Epochs end by need: see [`super::pace`]. Times are in milliseconds, from the release of one epoch to the suspend of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AutoInterval {
    /// Output that waits ends the epoch after this time at the earliest; later, while the guest has not run for as long as it stood
    /// still. 1 to 60 000.
    pub min_gap_ms: u64,
    /// Without any reason to end it an epoch takes this long. `min_gap_ms` to 60 000.
    pub max_interval_ms: u64,
}

impl Default for AutoInterval {
    fn default() -> Self {
        Self { min_gap_ms: 5, max_interval_ms: 500 }
    }
}

/// Where the epochs go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// To the `remusd` of a host, by an ssh-like command: `<ssh> <host> remusd connect`; without a command, by TLS if it is paired.
    Host {
        /// Host name as the ssh command takes it.
        host: String,
        /// The command; `None` is `ssh` with our options for unattended use.
        ssh: Option<String>,
    },
    /// To the `remusd` of a paired host, by TLS.
    Tls {
        /// Its name, as in `remus peers`.
        host: String,
        /// Its identity, from when protection began: another host under the same name is not it.
        #[serde(default)]
        id: Option<HostId>,
    },
    /// To whatever this shell command speaks to: its standard input and output carry the link.
    Command(String),
    /// Nowhere: checkpoints are taken and thrown away (`xl remus -b`). Protects nothing.
    Blackhole,
    /// UNSAFE: to a stock `xl migrate-receive -r` behind this shell command. No acknowledgement, no heartbeat; any end
    /// of the stream starts the copy (hazard F1).
    StockReceiver(String),
}

impl Target {
    /// Short form for people.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Host { host, .. } | Self::Tls { host, .. } => host.clone(),
            Self::Command(_) => "(command)".into(),
            Self::Blackhole => "(blackhole)".into(),
            Self::StockReceiver(_) => "(stock receiver)".into(),
        }
    }
}

/// What the backup's host does about protection once it runs the guest, after a failover or a switchover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// Nothing: an operator protects it again.
    #[default]
    Nothing,
    /// Protects it towards the host that it came from, as soon as that one answers.
    Back,
    /// Protects it towards this host, as soon as it answers.
    To(String),
}

/// The protection that follows on a failover or a switchover, as the primary tells the backup beforehand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Next {
    /// Where to.
    pub target: Target,
    /// How.
    pub options: ProtectOptions,
}

/// Options of one protection. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProtectOptions {
    /// From the release of one epoch to the suspend of the next. 1 to 60 000; `xl remus` has the same default.
    pub interval_ms: u64,
    /// In place of `interval_ms`, which then does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_interval: Option<AutoInterval>,
    /// Silence of the backup after which it counts as lost; also told to the backup for the other direction. 100 to 600 000.
    pub detection_ms: u64,
    /// How long the backup may take to acknowledge an epoch that it has been sent whole. 100 to 600 000.
    pub ack_deadline_ms: u64,
    /// How long a guest may take to suspend before the request is withdrawn. 100 to 60 000.
    pub suspend_deadline_ms: u64,
    /// How long a guest may stand still for one epoch before it is resumed whatever happens. 100 to 60 000.
    pub pause_deadline_ms: u64,
    /// How long the backup may take to confirm a stop. 100 to 600 000.
    pub stop_deadline_ms: u64,
    /// Bytes of one epoch held in dom0 at most. At least 16 MiB.
    pub epoch_budget: u64,
    /// Bytes of output held per vif at most; what is more is dropped and reported. At least 64 KiB.
    pub netbuffer_limit: u32,
    /// Pages of an unarmed epoch below which the next one is armed.
    pub arm_pages: u64,
    /// See [`OnBackupLoss`].
    pub on_backup_loss: OnBackupLoss,
    /// See [`OnPrimaryLoss`].
    pub on_primary_loss: OnPrimaryLoss,
    /// A script that makes the intermediate device of each vif in our place (`xl remus -N`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netbuffer_script: Option<PathBuf>,
    /// Programs that keep disks in step, by the disks' vdev names (docs/disks.md).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub disk_scripts: BTreeMap<String, PathBuf>,
    /// The witness that decides who goes on alone, as typed: an etcd's URL or `script:PATH`. `None` is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub witness: Option<String>,
    /// The backup's xl does not stay behind as the monitor of the activated guest (`xl remus -e`).
    pub no_monitor: bool,
    /// See [`Then`].
    pub then: Then,
    /// Take the domain out of xendomains' autostart while it is protected; it is put back when this host owns it, and remusd boots the
    /// domain in its place (hazard F4).
    pub manage_autostart: bool,
    /// See [`EngineKind`].
    pub engine: EngineKind,
    /// UNSAFE: output is not held at all (`xl remus -n`).
    pub no_netbuffer: bool,
    /// UNSAFE: disks on DRBD with protocol D are used, whose peer may be an epoch ahead of the memory.
    pub drbd: bool,
    /// UNSAFE: disks that are let pass although they are not replicated: a vdev name, or `all` (`xl remus -d`).
    pub unsafe_disks: Vec<String>,
}

impl Default for ProtectOptions {
    fn default() -> Self {
        Self {
            interval_ms: 200,
            auto_interval: None,
            detection_ms: 1000,
            ack_deadline_ms: 5000,
            suspend_deadline_ms: 2000,
            pause_deadline_ms: 5000,
            stop_deadline_ms: 10_000,
            epoch_budget: 1 << 30,
            netbuffer_limit: 64 << 20,
            arm_pages: Policy::default().arm_pages,
            on_backup_loss: OnBackupLoss::default(),
            on_primary_loss: OnPrimaryLoss::default(),
            netbuffer_script: None,
            disk_scripts: BTreeMap::new(),
            no_monitor: false,
            witness: None,
            then: Then::default(),
            manage_autostart: false,
            engine: EngineKind::default(),
            no_netbuffer: false,
            drbd: false,
            unsafe_disks: Vec::new(),
        }
    }
}

/// An option is out of its range.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Option {name} is {value}, which is not within {min} to {max}")]
pub struct OutOfRange {
    name: &'static str,
    value: u64,
    min: u64,
    max: u64,
}

impl ProtectOptions {
    /// Checks every range.
    ///
    /// # Errors
    /// [`OutOfRange`] names the first option that is out of its range.
    pub fn validate(&self) -> Result<(), OutOfRange> {
        let auto = self.auto_interval.unwrap_or_default();
        let rows = [
            ("interval-ms", self.interval_ms, 1, 60_000),
            ("auto-interval min-gap-ms", auto.min_gap_ms, 1, 60_000),
            ("auto-interval max-interval-ms", auto.max_interval_ms, auto.min_gap_ms, 60_000),
            ("detection-ms", self.detection_ms, 100, 600_000),
            ("ack-deadline-ms", self.ack_deadline_ms, 100, 600_000),
            ("suspend-deadline-ms", self.suspend_deadline_ms, 100, 60_000),
            ("pause-deadline-ms", self.pause_deadline_ms, 100, 60_000),
            ("stop-deadline-ms", self.stop_deadline_ms, 100, 600_000),
            ("epoch-budget", self.epoch_budget, 16 << 20, 1 << 40),
            ("netbuffer-limit", u64::from(self.netbuffer_limit), 64 << 10, u64::from(u32::MAX)),
        ];
        match rows.into_iter().find(|(_, value, min, max)| value < min || value > max) {
            Some((name, value, min, max)) => Err(OutOfRange { name, value, min, max }),
            None => Ok(()),
        }
    }

    /// The machine's part of the options.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            on_backup_loss: self.on_backup_loss,
            arm_pages: self.arm_pages,
            witness: self.witness.is_some(),
            ..Policy::default()
        }
    }

    /// How long an epoch takes that nothing ends earlier, from the release of the one before.
    #[must_use]
    pub fn longest_interval(&self) -> Duration {
        Duration::from_millis(self.auto_interval.map_or(self.interval_ms, |auto| auto.max_interval_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_in_range_and_limits_bite() {
        assert_eq!(ProtectOptions::default().validate(), Ok(()));
        let bad = ProtectOptions { detection_ms: 5, ..ProtectOptions::default() };
        assert_eq!(bad.validate().unwrap_err().name, "detection-ms");
        for (min_gap_ms, max_interval_ms, fits) in [(1, 1, true), (0, 9, false), (20, 10, false), (5, 60_001, false)] {
            let auto_interval = Some(AutoInterval { min_gap_ms, max_interval_ms });
            let options = ProtectOptions { auto_interval, ..ProtectOptions::default() };
            assert_eq!(options.validate().is_ok(), fits, "{min_gap_ms} to {max_interval_ms}");
        }
    }

    #[test]
    fn unknown_options_are_refused() {
        assert!(serde_json::from_str::<ProtectOptions>(r#"{"intervall_ms": 5}"#).is_err());
        assert!(serde_json::from_str::<ProtectOptions>(r#"{"auto_interval": {"max_ms": 5}}"#).is_err());
    }

    #[test]
    fn an_older_peer_hears_of_the_automatic_interval_only_where_it_is_asked_for() {
        let text = serde_json::to_string(&ProtectOptions::default()).unwrap();
        assert!(!text.contains("auto_interval"), "{text}");
        let options: ProtectOptions = serde_json::from_str(r#"{"auto_interval": {"max_interval_ms": 100}}"#).unwrap();
        assert_eq!(options.auto_interval, Some(AutoInterval { min_gap_ms: 5, max_interval_ms: 100 }));
        assert_eq!(options.longest_interval(), Duration::from_millis(100));
    }
}
