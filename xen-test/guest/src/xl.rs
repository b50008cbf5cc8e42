//! The guest as `xl` is told to build it.
//!
//! The configurations `xl/pvh.cfg` and `xl/hvm.cfg` of this crate are complete
//! as they are; the harness puts them, the kernel and the initramfs into
//! [`DIR`] of each dom0. A [`GuestSpec`] is such a guest under a name and
//! addresses of its own.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::protocol::default_ip6;

/// Where dom0 keeps the guest's files.
pub const DIR: &str = "/opt/guest";
/// Contents of `pvh.cfg`.
pub const PVH_CFG: &str = include_str!("../xl/pvh.cfg");
/// Contents of `hvm.cfg`.
pub const HVM_CFG: &str = include_str!("../xl/hvm.cfg");

/// What kind of virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// PVH: no device model.
    Pvh,
    /// HVM: with a device model, but PV network in use.
    Hvm,
}

/// A guest to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpec {
    /// Kind of machine, and with it the configuration file.
    pub kind: Kind,
    /// Name of the domain.
    pub name: String,
    /// IPv4 address, in a /24.
    pub ip: Ipv4Addr,
    /// Hardware address of its vif.
    pub mac: [u8; 6],
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Added to the kernel command line.
    pub extra: String,
    /// Its disks, as in xl.cfg; it runs from its initramfs and needs none.
    pub disks: Vec<String>,
}

impl GuestSpec {
    /// The guest that the configuration file describes by itself.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            name: "guest".into(),
            ip: Ipv4Addr::new(10, 77, 0, 11),
            mac: [0x00, 0x16, 0x3e, 0x77, 0x00, 0x0b],
            memory_mb: match kind {
                Kind::Pvh => 128,
                Kind::Hvm => 160,
            },
            extra: String::new(),
            disks: Vec::new(),
        }
    }

    /// The same guest with another name, and addresses that end in `n`.
    #[must_use]
    pub fn numbered(mut self, name: &str, n: u8) -> Self {
        name.clone_into(&mut self.name);
        let [a, b, c, _] = self.ip.octets();
        self.ip = Ipv4Addr::new(a, b, c, n);
        self.mac[5] = n;
        self
    }

    /// Its IPv6 address, in a /64.
    pub fn ip6(&self) -> Ipv6Addr {
        default_ip6(self.ip)
    }

    /// The command line for dom0's shell that creates it, without options
    /// (add `-p` and the like at the end).
    pub fn create_command(&self) -> String {
        let words: Vec<String> = self.settings().iter().map(|setting| format!("'{setting}'")).collect();
        format!("xl create {} {}", self.file(), words.join(" "))
    }

    /// The command line for dom0's shell that writes its whole configuration into a file.
    pub fn write_command(&self, path: &str) -> String {
        format!("{{ cat {}; cat <<'END'\n{}\nEND\n}} >{path}", self.file(), self.settings().join("\n"))
    }

    fn file(&self) -> String {
        format!("{DIR}/{}", if self.kind == Kind::Pvh { "pvh.cfg" } else { "hvm.cfg" })
    }

    /// What it has of its own, to be added to the file.
    fn settings(&self) -> Vec<String> {
        let console = if self.kind == Kind::Pvh { "hvc0" } else { "ttyS0 console=hvc0" };
        let mac: Vec<String> = self.mac.iter().map(|b| format!("{b:02x}")).collect();
        let mut extra = format!("console={console} quiet panic=-1 xen_legacy_crash guest.ip={}/24", self.ip);
        if !self.extra.is_empty() {
            let _ = write!(extra, " {}", self.extra);
        }
        let mut values = vec![
            format!("name=\"{}\"", self.name),
            format!("memory={}", self.memory_mb),
            format!("maxmem={}", self.memory_mb),
            format!("vif=[\"mac={},bridge=xenbr0\"]", mac.join(":")),
            format!("extra=\"{extra}\""),
        ];
        if !self.disks.is_empty() {
            let disks: Vec<String> = self.disks.iter().map(|disk| format!("\"{disk}\"")).collect();
            values.push(format!("disk=[{}]", disks.join(",")));
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of `key = value` in a configuration file.
    fn value<'a>(cfg: &'a str, key: &str) -> &'a str {
        cfg.lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(" = "))
            .unwrap_or_else(|| panic!("no {key}"))
            .trim_matches(['[', ']', ' ', '"'])
    }

    #[test]
    fn the_plain_guest_is_that_of_the_file() {
        for (kind, cfg) in [(Kind::Pvh, PVH_CFG), (Kind::Hvm, HVM_CFG)] {
            let command = GuestSpec::new(kind).create_command();
            for key in ["name", "memory", "maxmem", "vif", "extra"] {
                let v = value(cfg, key);
                assert!(
                    [format!("'{key}={v}'"), format!("'{key}=\"{v}\"'"), format!("'{key}=[\"{v}\"]'")]
                        .iter()
                        .any(|w| command.contains(w)),
                    "{key} = {v} is not in: {command}"
                );
            }
        }
    }

    #[test]
    fn a_numbered_guest_has_its_own_name_and_addresses() {
        let g = GuestSpec { extra: "loglevel=7".into(), ..GuestSpec::new(Kind::Hvm).numbered("two", 12) };
        let command = g.create_command();
        for part in ["hvm.cfg", "name=\"two\"", "mac=00:16:3e:77:00:0c", "guest.ip=10.77.0.12/24 loglevel=7\""] {
            assert!(command.contains(part), "{part} is not in: {command}");
        }
        assert_eq!(g.ip6().to_string(), "fd77::a4d:c");
    }
}
