//! The configuration: `/etc/remus/remusd.toml` and its drop-ins (`files`), what is wrong with it (`problem`), and what of it a running
//! daemon can take over (`change`), and the command that looks at it (`check`). Nothing of it need exist; what it does not say has a default; what is not known in it is an error,
//! because a misspelt setting would otherwise silently not hold.

mod change;
mod check;
mod events;
pub(crate) mod files;
mod problem;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Deserializer, Serialize};

pub use change::{Change, changes};
pub use check::{Report, check};
pub use events::Events;
pub use files::{Loaded, drop_ins};
pub use problem::{ConfigError, Problem, parse};

/// Where it is. The drop-ins are in the folder of the same name with `.d` behind it.
pub const PATH: &str = "/etc/remus/remusd.toml";

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where paired hosts arrive.
    pub listen: Listen,
    /// Who may ask.
    pub control: Control,
    /// As the backup of other hosts' guests.
    pub backup: Backup,
    /// What is written to the log.
    pub log: Log,
    /// Figures for a monitoring system.
    pub metrics: Metrics,
    /// Who is told what happens.
    pub events: Events,
}

/// `[listen]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// Address to listen at; `::` is every address, IPv4 too.
    pub address: IpAddr,
    /// TCP port, 1024 to 65535.
    #[serde(deserialize_with = "port")]
    pub port: u16,
}

impl Default for Listen {
    fn default() -> Self {
        Self { address: Ipv6Addr::UNSPECIFIED.into(), port: crate::link::tls::DEFAULT_PORT }
    }
}

/// `[control]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// Group whose members reach the control socket, and may read status and events. Without it only root does.
    pub group: Option<String>,
    /// Group whose members may also act: protect, unprotect, fail over. They must be in the other group too. Without it only root may.
    pub admins: Option<String>,
}

/// `[backup]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backup {
    /// A shell command that succeeds when guests would be reachable from this host, such as a ping to the gateway. It has 5 s. When it
    /// fails this host does not take a guest over by itself (hazard F22); an operator still can.
    pub lan_check: Option<String>,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// How much is logged, as `tracing-subscriber`'s `EnvFilter` reads it: `info`, `debug`, `info,remusd::link=trace`. The environment's
    /// `REMUSD_LOG` wins.
    #[serde(deserialize_with = "filter")]
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info".into() }
    }
}

/// `[metrics]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Where figures are given away in the OpenMetrics format (`GET /metrics`): `ADDRESS:PORT`, or a port of this host's own address
    /// (127.0.0.1) alone. Without it, nowhere. Whoever reaches it may read.
    #[serde(deserialize_with = "place")]
    pub listen: Option<SocketAddr>,
}

fn place<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let address = match text.parse::<u16>() {
        Ok(port) => Some((Ipv4Addr::LOCALHOST, port).into()),
        Err(_) => text.parse::<SocketAddr>().ok(),
    };
    match address {
        Some(address) if address.port() >= 1024 => Ok(Some(address)),
        Some(_) => Err(serde::de::Error::custom(format!("listen is {text}: choose a port from 1024 on"))),
        None => {
            Err(serde::de::Error::custom(format!("listen is {text}: give ADDRESS:PORT, or a port of 127.0.0.1 alone")))
        }
    }
}

fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let port = u16::deserialize(deserializer)?;
    if port < 1024 {
        // The daemon gives up the right to the ports below, and 0 would be another one each time.
        return Err(serde::de::Error::custom(format!("port is {port}: choose one from 1024 on, or leave it out")));
    }
    Ok(port)
}

fn filter<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match tracing_subscriber::EnvFilter::try_new(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(serde::de::Error::custom(format!("filter is no log filter: {error}"))),
    }
}

impl Config {
    /// Understands the text of one file.
    ///
    /// # Errors
    /// Line, column and what is wrong.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        parse(text)
    }
}
