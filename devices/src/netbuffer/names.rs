//! The names of intermediate devices.

use super::error::NetError;

/// `IFNAMSIZ` of `linux/if.h`, without the terminating zero.
const LONGEST: usize = 15;
/// For a device's first interface, the PV vif, and for its second, the tap of the emulated card.
const PREFIXES: [&str; 2] = ["rmifb", "rmemu"];

/// The intermediate device for the `nth` interface of a device.
pub(super) fn ifb_name(nth: usize, domid: u32, devid: u32) -> Result<String, NetError> {
    let name = match PREFIXES.get(nth) {
        Some(prefix) => format!("{prefix}{domid}.{devid}"),
        None => format!("rmif{nth}-{domid}.{devid}"),
    };
    if name.len() > LONGEST {
        return Err(NetError::Name(name));
    }
    Ok(name)
}

/// The domain and device of an intermediate device, if its name is one of ours.
pub(super) fn device_of(name: &str) -> Option<(u32, u32)> {
    let rest = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).or_else(|| {
        let (nth, rest) = name.strip_prefix("rmif")?.split_once('-')?;
        nth.parse::<u8>().ok().map(|_| rest)
    })?;
    let (domid, devid) = rest.split_once('.')?;
    Some((domid.parse().ok()?, devid.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_are_read_back() {
        for (nth, domid, devid, name) in [
            (0, 3, 0, "rmifb3.0"),
            (1, 3, 1, "rmemu3.1"),
            (2, 3, 1, "rmif2-3.1"),
            // The highest domid Xen gives out, and a devid of four digits.
            (0, 32751, 1023, "rmifb32751.1023"),
        ] {
            assert_eq!(ifb_name(nth, domid, devid).unwrap(), name);
            assert_eq!(device_of(name), Some((domid, devid)));
        }
        assert!(ifb_name(0, 32751, 10_000).is_err());
    }

    #[test]
    fn other_names_are_not_ours() {
        for name in ["ifb0", "rmifb", "rmifb3", "rmifbx.1", "vif3.0", "rmif-3.0", "rmifb3.0x"] {
            assert_eq!(device_of(name), None, "{name}");
        }
    }
}
