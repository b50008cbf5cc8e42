//! What the toolstack knows of a domain: its configuration as libxl's JSON and what to do when it ends.

use serde::Deserialize;
use tokio::process::Command;

use super::machine::GuestEnd;
use crate::ids::DomId;

/// What a domain's configuration says for one way of ending (xl.cfg(5), `on_poweroff` and its kin).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnEnd {
    /// Destroy the domain.
    Destroy,
    /// Destroy it and boot it anew.
    Restart,
    /// Keep the dead domain under a new name and boot it anew; done as a plain restart here, and said so.
    RenameRestart,
    /// Keep the dead domain.
    Preserve,
    /// Dump its core, then destroy.
    CoredumpDestroy,
    /// Dump its core, then restart.
    CoredumpRestart,
    /// Reset it in place.
    SoftReset,
}

/// A domain's configuration.
#[derive(Clone, Debug)]
pub struct DomainConfig {
    /// libxl's JSON (`libxl_domain_config`), verbatim.
    pub json: String,
    value: serde_json::Value,
}

/// The toolstack could not tell.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// xl cannot be run.
    #[error("Cannot run xl: {0}; is xen-utils installed and this the dom0 of a running Xen?")]
    Spawn(#[from] std::io::Error),
    /// xl says no.
    #[error("xl list -l {domid} failed: {text}")]
    Xl {
        /// Which domain.
        domid: DomId,
        /// xl's words.
        text: String,
    },
    /// xl's answer is not what it should be.
    #[error("xl's configuration of domain {domid} cannot be understood: {text}")]
    Format {
        /// Which domain.
        domid: DomId,
        /// What is wrong.
        text: String,
    },
}

impl DomainConfig {
    /// Asks `xl list -l`. Takes some 100 ms.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub async fn of(domid: DomId) -> Result<Self, ConfigError> {
        let output = Command::new("xl").args(["list", "-l", &domid.to_string()]).output().await?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
            return Err(ConfigError::Xl { domid, text });
        }
        Self::from_listing(domid, &output.stdout)
    }

    fn from_listing(domid: DomId, listing: &[u8]) -> Result<Self, ConfigError> {
        let format = |text: String| ConfigError::Format { domid, text };
        let value: serde_json::Value = serde_json::from_slice(listing).map_err(|e| format(e.to_string()))?;
        // One domain by id is printed as an object by 4.17, as a list of one by others.
        let entry = value.get(0).unwrap_or(&value);
        let config = entry.get("config").ok_or_else(|| format("no \"config\"".into()))?;
        Self::parse(config.to_string()).map_err(|e| format(e.to_string()))
    }

    /// Takes libxl's JSON as kept earlier.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn parse(json: String) -> Result<Self, serde_json::Error> {
        let value = serde_json::from_str(&json)?;
        Ok(Self { json, value })
    }

    /// What to do when the guest ends this way; xl.cfg's defaults where the configuration is silent (libxl leaves them out).
    #[must_use]
    pub fn on_end(&self, end: GuestEnd) -> OnEnd {
        let (key, default) = match end {
            GuestEnd::Poweroff | GuestEnd::Gone => ("on_poweroff", OnEnd::Destroy),
            GuestEnd::Reboot => ("on_reboot", OnEnd::Restart),
            GuestEnd::Crash => ("on_crash", OnEnd::Destroy),
            GuestEnd::Watchdog => ("on_watchdog", OnEnd::Destroy),
        };
        self.value.get(key).and_then(|v| serde_json::from_value(v.clone()).ok()).unwrap_or(default)
    }

    /// The guest's type: `hvm`, `pvh` or `pv`.
    #[must_use]
    pub fn guest_type(&self) -> &str {
        self.value.pointer("/c_info/type").and_then(|v| v.as_str()).unwrap_or("pv")
    }

    /// Names of things in the configuration that cannot be checkpointed, with what to do (hazard F13).
    #[must_use]
    pub fn unsupported(&self) -> Vec<String> {
        [
            ("pcidevs", "PCI passthrough"),
            ("usbdevs", "USB passthrough"),
            ("vtpms", "a virtual TPM"),
            ("p9s", "9pfs shares"),
            ("pvcallsifs", "PV calls"),
            ("vkbs", "a PV keyboard"),
        ]
        .into_iter()
        .filter(|(key, _)| self.value.get(key).and_then(|v| v.as_array()).is_some_and(|a| !a.is_empty()))
        .map(|(key, what)| format!("{what} (\"{key}\")"))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> DomainConfig {
        DomainConfig::parse(json.into()).unwrap()
    }

    #[test]
    fn reads_xls_words_and_knows_its_defaults() {
        let silent = config("{}");
        assert_eq!(silent.on_end(GuestEnd::Poweroff), OnEnd::Destroy);
        assert_eq!(silent.on_end(GuestEnd::Reboot), OnEnd::Restart);
        let spoken = config(r#"{"on_reboot":"preserve","on_crash":"coredump_restart","c_info":{"type":"pvh"}}"#);
        assert_eq!(spoken.on_end(GuestEnd::Reboot), OnEnd::Preserve);
        assert_eq!(spoken.on_end(GuestEnd::Crash), OnEnd::CoredumpRestart);
        assert_eq!(spoken.guest_type(), "pvh");
    }

    #[test]
    fn takes_a_listing_as_an_object_or_a_list() {
        for listing in
            [r#"{"domid":1,"config":{"on_crash":"restart"}}"#, r#"[{"domid":1,"config":{"on_crash":"restart"}}]"#]
        {
            let config = DomainConfig::from_listing(DomId(1), listing.as_bytes()).unwrap();
            assert_eq!(config.on_end(GuestEnd::Crash), OnEnd::Restart);
        }
        assert!(DomainConfig::from_listing(DomId(1), b"oops").is_err());
    }

    #[test]
    fn names_what_cannot_be_checkpointed() {
        let text = config(r#"{"pcidevs":[{"dev":1}],"vtpms":[]}"#).unsupported();
        assert_eq!(text.len(), 1);
        assert!(text[0].contains("PCI"));
    }
}
