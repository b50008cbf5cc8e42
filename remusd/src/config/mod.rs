//! The configuration file, `/etc/remus/remusd.toml`. It need not exist; what it does not say has a default; what is not known in it
//! is an error, because a misspelt setting would otherwise silently not hold.

use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where it is.
pub const PATH: &str = "/etc/remus/remusd.toml";

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where paired hosts arrive.
    pub listen: Listen,
    /// Who may ask.
    pub control: Control,
    /// As the backup of other hosts' guests.
    pub backup: Backup,
}

/// `[listen]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// Address to listen at; `::` is every address, IPv4 too.
    pub address: IpAddr,
    /// TCP port.
    pub port: u16,
}

impl Default for Listen {
    fn default() -> Self {
        Self { address: Ipv6Addr::UNSPECIFIED.into(), port: crate::link::tls::DEFAULT_PORT }
    }
}

/// `[control]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// Group whose members reach the control socket, and may read status and events. Without it only root does.
    pub group: Option<String>,
    /// Group whose members may also act: protect, unprotect, fail over. They must be in the other group too. Without it only root may.
    pub admins: Option<String>,
}

/// `[backup]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backup {
    /// A shell command that succeeds when guests would be reachable from this host, such as a ping to the gateway. It has 5 s. When it
    /// fails this host does not take a guest over by itself (hazard F22); an operator still can.
    pub lan_check: Option<String>,
}

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not readable.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Not understood; the text points at the place.
    #[error("{}: {text}", .path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// Line, column and what is wrong.
        text: String,
    },
}

impl Config {
    /// Reads the file; without one all is default.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text)
                .map_err(|text| ConfigError::Format { path: path.to_owned(), text: text.trim_end().to_owned() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Io { path: path.to_owned(), source }),
        }
    }

    /// Understands its text.
    ///
    /// # Errors
    /// Line, column and what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if config.listen.port < 1024 {
            // The daemon gives up the right to the ports below, and 0 would be another one each time.
            return Err(format!("listen.port is {}: choose one from 1024 on, or leave it out", config.listen.port));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_settings_and_what_is_wrong() {
        assert_eq!(Config::load(Path::new("/nonexistent/remusd.toml")).unwrap(), Config::default());
        let config =
            Config::parse("[listen]\naddress = \"10.0.0.1\"\nport = 7000\n[control]\ngroup = \"adm\"\n").unwrap();
        assert_eq!(config.listen, Listen { address: [10, 0, 0, 1].into(), port: 7000 });
        assert_eq!(config.control.group.as_deref(), Some("adm"));
        let config = Config::parse("[backup]\nlan_check = \"ping -c1 10.0.0.1\"\n").unwrap();
        assert_eq!(config.backup.lan_check.as_deref(), Some("ping -c1 10.0.0.1"));
        assert_eq!(Config::parse("[listen]\nport = 7000\n").unwrap().listen.address, Listen::default().address);
        for (text, word) in [
            ("[listen]\nprot = 1\n", "prot"),
            ("[lissen]\n", "lissen"),
            ("[listen]\nport = 0\n", "port is 0"),
            ("listen = 3", "line 1"),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn the_documented_example_is_understood() {
        let example = include_str!("../../../scripts/remusd.toml");
        assert_eq!(Config::parse(example).unwrap(), Config::default(), "what is commented out is the default");
        let active: String =
            example.lines().map(|line| line.strip_prefix("#= ").unwrap_or(line)).collect::<Vec<_>>().join("\n");
        let config = Config::parse(&active).unwrap();
        assert_eq!((config.listen, config.control.group.is_some()), (Listen::default(), true));
    }
}
