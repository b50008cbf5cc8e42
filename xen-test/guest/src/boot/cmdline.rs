//! The guest's parameters on the kernel command line.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::protocol::default_ip6;

/// A `guest.` parameter that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel command line: {key}={value}: expected {expected}")]
pub struct CmdlineError {
    key: String,
    value: String,
    expected: &'static str,
}

/// The guest's network as the kernel command line gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// The interface (`guest.if`, default `eth0`).
    pub interface: String,
    /// Address and prefix length (`guest.ip`).
    pub ip: (Ipv4Addr, u8),
    /// Address and prefix length (`guest.ip6`).
    pub ip6: (Ipv6Addr, u8),
    /// Hardware address to set (`guest.mac`).
    pub mac: Option<[u8; 6]>,
    /// Gateway of the default route (`guest.gw`).
    pub gateway: Option<Ipv4Addr>,
}

impl NetConfig {
    /// Reads a command line; `None` without `guest.ip`.
    ///
    /// # Errors
    /// An unknown `guest.` parameter, or a value that does not parse.
    pub fn from_cmdline(text: &str) -> Result<Option<Self>, CmdlineError> {
        let (mut ip, mut ip6, mut mac, mut gateway) = (None, None, None, None);
        let mut interface = "eth0".to_owned();
        for word in text.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=').filter(|(k, _)| k.starts_with("guest.")) else {
                continue;
            };
            let bad = |expected| CmdlineError { key: key.into(), value: value.into(), expected };
            match key {
                "guest.ip" => ip = Some(with_prefix(value, 32).ok_or_else(|| bad("A.B.C.D/LEN"))?),
                "guest.ip6" => {
                    ip6 = Some(with_prefix(value, 128).ok_or_else(|| bad("an IPv6 ADDRESS/LEN"))?);
                }
                "guest.mac" => {
                    mac = Some(parse_mac(value).ok_or_else(|| bad("XX:XX:XX:XX:XX:XX"))?);
                }
                "guest.gw" => gateway = Some(value.parse().map_err(|_| bad("A.B.C.D"))?),
                "guest.if" => value.clone_into(&mut interface),
                _ => return Err(bad("guest.ip, guest.ip6, guest.mac, guest.gw or guest.if")),
            }
        }
        Ok(ip.map(|ip: (Ipv4Addr, u8)| Self {
            interface,
            ip,
            ip6: ip6.unwrap_or((default_ip6(ip.0), 64)),
            mac,
            gateway,
        }))
    }
}

fn with_prefix<T: FromStr>(text: &str, longest: u8) -> Option<(T, u8)> {
    let (ip, prefix) = text.split_once('/')?;
    Some((ip.parse().ok()?, prefix.parse().ok().filter(|p| *p <= longest)?))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_command_line() {
        let c = NetConfig::from_cmdline(
            "console=hvc0 quiet guest.ip=10.9.0.5/24 guest.ip6=fd00::5/64 guest.mac=00:16:3e:aa:bb:0c guest.gw=10.9.0.1\n",
        );
        let want = NetConfig {
            interface: "eth0".into(),
            ip: (Ipv4Addr::new(10, 9, 0, 5), 24),
            ip6: ("fd00::5".parse().expect("an address"), 64),
            mac: Some([0, 0x16, 0x3e, 0xaa, 0xbb, 0x0c]),
            gateway: Some(Ipv4Addr::new(10, 9, 0, 1)),
        };
        assert_eq!(c, Ok(Some(want)));
    }

    #[test]
    fn the_rest_is_optional() {
        assert_eq!(NetConfig::from_cmdline("quiet guest.if=eth1"), Ok(None));
        let c = NetConfig::from_cmdline("guest.ip=10.9.0.5/24").expect("valid").expect("an address");
        assert_eq!((c.mac, c.gateway), (None, None));
        assert_eq!(c.ip6, ("fd77::a09:5".parse().expect("an address"), 64));
    }

    #[test]
    fn nonsense_is_named() {
        for bad in [
            "guest.ip=10.9.0.5",
            "guest.ip=10.9.0/24",
            "guest.ip=10.9.0.5/33",
            "guest.ip=1.2.3.4/8 guest.mac=00:16:3e:aa:bb",
            "guest.ip=1.2.3.4/8 guest.mac=00:16:3e:aa:bb:cc:dd",
            "guest.ip=1.2.3.4/8 guest.mac=+0:16:3e:aa:bb:cc",
            "guest.gateway=1.2.3.4",
        ] {
            let e = NetConfig::from_cmdline(bad).expect_err(bad).to_string();
            assert!(e.contains("guest."), "{e}");
        }
    }
}
