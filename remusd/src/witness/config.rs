//! Settings of the witness, and the check that it stands on neither host.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::etcd::EtcdStore;
use super::script::ScriptStore;
use super::store::WitnessStore;

/// Which witness, and how it is probed. Exactly one of `etcd` and `script`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WitnessConfig {
    /// An etcd server or cluster.
    pub etcd: Option<EtcdConfig>,
    /// A program.
    pub script: Option<ScriptConfig>,
    /// Continuous probing.
    pub probe: ProbeConfig,
}

/// An etcd server or cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`, all of one cluster.
    pub endpoints: Vec<String>,
    /// The certificate authority of the servers' certificates, PEM. Needed with https.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Client certificate, PEM; with `key`.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[serde(default)]
    pub key: Option<PathBuf>,
    /// etcd user; with `password_file`.
    #[serde(default)]
    pub user: Option<String>,
    /// A file whose first line is the password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// Where the records are: `PREFIX` and the domain's UUID.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// How long one request to one endpoint may take, milliseconds, 100 to 60000.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
}

/// A program that keeps the record; docs/witness.md has the contract.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptConfig {
    /// Absolute path.
    pub path: PathBuf,
    /// How long one run may take, milliseconds, 100 to 600000. A fence device is slow.
    #[serde(default = "default_script_timeout")]
    pub timeout_ms: u64,
}

/// Continuous probing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProbeConfig {
    /// Milliseconds from one probe's end to the next one's start, 50 to 3600000.
    pub interval_ms: u64,
    /// So many failures one after another are down; 1 to 100.
    pub down_after: u32,
    /// So many successes one after another are up again; 1 to 100.
    pub up_after: u32,
}

impl Default for ProbeConfig {
    fn default() -> Self {
        Self { interval_ms: 1000, down_after: 3, up_after: 3 }
    }
}

fn default_prefix() -> String {
    "/remusd/witness/".into()
}

fn default_timeout() -> u64 {
    2000
}

fn default_script_timeout() -> u64 {
    30_000
}

/// The witness cannot be used as configured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A setting makes no sense.
    #[error("Witness: {0}")]
    Setting(String),
    /// A file cannot be read.
    #[error("Witness: {path}: {text}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        text: String,
    },
    /// A name cannot be resolved, so it cannot be told whether it is one of the two hosts.
    #[error("Witness: {host} cannot be resolved: {text}; use an address, or put the name in /etc/hosts")]
    Resolve {
        /// Which.
        host: String,
        /// Why.
        text: String,
    },
    /// The witness would die with one of the hosts.
    #[error(
        "Witness: {endpoint} ({address}) is on {whose}: a witness on one of the two hosts dies with it, and then nobody can say who \
         runs the guest. Put it on a third machine"
    )]
    OnHost {
        /// As configured.
        endpoint: String,
        /// Resolved.
        address: IpAddr,
        /// "this host" or the peer's name.
        whose: String,
    },
}

fn within(what: &str, value: u64, range: std::ops::RangeInclusive<u64>) -> Result<(), ConfigError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Setting(format!("{what} is {value}, and has to be {} to {}", range.start(), range.end())))
}

impl EtcdConfig {
    /// Checks what can be checked without asking anybody.
    ///
    /// # Errors
    /// [`ConfigError::Setting`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |text: &str| Err(ConfigError::Setting(text.into()));
        within("etcd.timeout_ms", self.timeout_ms, 100..=60_000)?;
        if self.endpoints.is_empty() {
            return wrong("etcd.endpoints is empty");
        }
        for e in &self.endpoints {
            host_of(e)?;
        }
        let https = self.endpoints.iter().filter(|e| e.starts_with("https:")).count();
        if https != 0 && https != self.endpoints.len() {
            return wrong("etcd.endpoints mixes http and https");
        }
        if https != 0 && self.ca.is_none() {
            return wrong("etcd.endpoints has https, so etcd.ca is needed");
        }
        if https == 0 && (self.ca.is_some() || self.cert.is_some() || self.key.is_some()) {
            return wrong("etcd.ca, etcd.cert and etcd.key are for https endpoints; these are http");
        }
        if self.cert.is_some() != self.key.is_some() {
            return wrong("etcd.cert and etcd.key go together");
        }
        if self.user.is_some() != self.password_file.is_some() {
            return wrong("etcd.user and etcd.password_file go together");
        }
        if !self.prefix.ends_with('/') {
            return wrong("etcd.prefix has to end with /");
        }
        Ok(())
    }
}

/// `HOST:PORT` of an endpoint.
fn host_of(endpoint: &str) -> Result<(&str, u16), ConfigError> {
    let parse = || {
        let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"))?;
        let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
        let host = host.strip_prefix('[').map_or(Some(host), |h| h.strip_suffix(']'))?;
        (!host.is_empty() && !host.contains('/')).then_some((host, port.parse().ok()?))
    };
    parse().ok_or_else(|| {
        ConfigError::Setting(format!("etcd.endpoints: {endpoint:?} is not http://HOST:PORT or https://HOST:PORT"))
    })
}

async fn resolve(host: &str, port: u16) -> Result<Vec<IpAddr>, ConfigError> {
    let failed = |text: String| ConfigError::Resolve { host: host.to_owned(), text };
    let found = tokio::net::lookup_host((host, port)).await.map_err(|e| failed(e.to_string()))?;
    Ok(found.map(|a| a.ip().to_canonical()).collect())
}

/// The addresses of this host's interfaces.
fn local_addresses() -> Result<Vec<IpAddr>, ConfigError> {
    let all = nix::ifaddrs::getifaddrs()
        .map_err(|e| ConfigError::Setting(format!("this host's addresses cannot be listed: {e}")))?;
    Ok(all
        .filter_map(|i| {
            let address = i.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .collect())
}

impl WitnessConfig {
    /// Makes the store; asks nobody yet.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn open(&self) -> Result<Arc<dyn WitnessStore>, ConfigError> {
        within("probe.interval_ms", self.probe.interval_ms, 50..=3_600_000)?;
        within("probe.down_after", self.probe.down_after.into(), 1..=100)?;
        within("probe.up_after", self.probe.up_after.into(), 1..=100)?;
        match (&self.etcd, &self.script) {
            (Some(etcd), None) => Ok(Arc::new(EtcdStore::new(etcd)?)),
            (None, Some(script)) => Ok(Arc::new(ScriptStore::new(script)?)),
            _ => Err(ConfigError::Setting("exactly one of etcd and script has to be set".into())),
        }
    }

    /// Refuses a witness on this host or on `peer` (a host name or address). Resolves names, so it may take a while. Where a script
    /// keeps its record is not known and is up to whoever wrote it.
    ///
    /// # Errors
    /// [`ConfigError::OnHost`]; [`ConfigError::Resolve`] if a name cannot be resolved.
    pub async fn check_place(&self, peer: &str) -> Result<(), ConfigError> {
        let Some(etcd) = &self.etcd else { return Ok(()) };
        let local = local_addresses()?;
        let peers = resolve(peer, 0).await?;
        for endpoint in &etcd.endpoints {
            let (host, port) = host_of(endpoint)?;
            for address in resolve(host, port).await? {
                let whose = if address.is_loopback() || address.is_unspecified() || local.contains(&address) {
                    "this host"
                } else if peers.contains(&address) {
                    peer
                } else {
                    continue;
                };
                let (endpoint, whose) = (endpoint.clone(), whose.to_owned());
                return Err(ConfigError::OnHost { endpoint, address, whose });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<WitnessConfig, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    fn etcd(more: &str) -> Result<(), String> {
        let config = parse(&format!(r#"{{"etcd":{{"endpoints":["https://w:2379"]{more}}}}}"#))?;
        config.etcd.unwrap().check().map_err(|e| e.to_string())
    }

    #[test]
    fn refuses_what_it_does_not_know_or_cannot_be_meant() {
        assert!(parse(r#"{"etdc":{}}"#).unwrap_err().contains("etdc"));
        assert!(etcd(r#","timeout":5"#).unwrap_err().contains("timeout"));
        for (more, word) in [
            ("", "etcd.ca is needed"),
            (r#","ca":"a","cert":"c""#, "go together"),
            (r#","ca":"a","user":"u""#, "go together"),
            (r#","ca":"a","timeout_ms":5"#, "100 to 60000"),
            (r#","ca":"a","prefix":"x""#, "end with /"),
        ] {
            assert!(etcd(more).unwrap_err().contains(word), "{more}");
        }
        assert_eq!(etcd(r#","ca":"a","cert":"c","key":"k","user":"u","password_file":"p""#), Ok(()));
        for endpoint in
            ["w:2379", "http://w", "http://:1", "http://[::1:2", "http://w:99999", "ftp://w:1", "http://w/x:1"]
        {
            assert!(host_of(endpoint).is_err(), "{endpoint}");
        }
        assert_eq!(host_of("https://[fd00::1]:2379/"), Ok(("fd00::1", 2379)));
        let open = |text: &str| parse(text).unwrap().open().err().unwrap().to_string();
        assert!(open("{}").contains("exactly one"));
        assert!(open(r#"{"script":{"path":"/x"},"etcd":{"endpoints":["http://w:1"]}}"#).contains("exactly one"));
        assert!(open(r#"{"script":{"path":"/x"},"probe":{"down_after":0}}"#).contains("down_after"));
        assert!(open(r#"{"etcd":{"endpoints":["https://w:1"],"ca":"/no/such/file"}}"#).contains("/no/such/file"));
    }

    #[tokio::test]
    async fn refuses_a_witness_on_one_of_the_two_hosts() {
        let at = |endpoint: &str| {
            parse(&format!(r#"{{"etcd":{{"endpoints":["http://203.0.113.9:1","{endpoint}"]}}}}"#)).unwrap()
        };
        for (endpoint, whose) in [
            ("http://127.0.0.1:2379", "this host"),
            ("http://localhost:2379", "this host"),
            ("http://[::1]:2379", "this host"),
            ("http://192.0.2.7:2379", "192.0.2.7"),
            ("http://[::ffff:192.0.2.7]:2379", "192.0.2.7"),
        ] {
            match at(endpoint).check_place("192.0.2.7").await {
                Err(ConfigError::OnHost { whose: w, .. }) => assert_eq!(w, whose, "{endpoint}"),
                other => panic!("{endpoint}: {other:?}"),
            }
        }
        let own = local_addresses().unwrap().into_iter().find(|a| a.is_ipv4()).unwrap();
        assert!(at(&format!("http://{own}:1")).check_place("192.0.2.7").await.is_err());
        assert_eq!(at("http://192.0.2.8:2379").check_place("192.0.2.7").await, Ok(()));
        let unknown = at("http://no-such-host.invalid:1").check_place("192.0.2.7").await;
        assert!(matches!(unknown, Err(ConfigError::Resolve { .. })), "{unknown:?}");
    }
}
