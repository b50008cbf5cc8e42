//! What the daemon may do as root, and its children after it: only what Xen's tools need.
//!
//! The bounding set is what counts: it limits every program that is started from here, for good, `xl`, hotplug scripts and the device
//! model of an activated guest among them. scripts/remusd.service has the same list; a test compares them.

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What is kept, as the kernel names it, and why.
pub const NEEDED: &[(&str, CapabilitySet, &str)] = &[
    ("CAP_CHOWN", CapabilitySet::CHOWN, "the control socket's group; libxl gives a device model's files to its user"),
    ("CAP_DAC_OVERRIDE", CapabilitySet::DAC_OVERRIDE, "disk images, logs and state files of other users"),
    ("CAP_FOWNER", CapabilitySet::FOWNER, "modes of such files"),
    ("CAP_KILL", CapabilitySet::KILL, "ends device models, which may run as another user"),
    ("CAP_SETGID", CapabilitySet::SETGID, "a device model's user"),
    ("CAP_SETUID", CapabilitySet::SETUID, "a device model's user"),
    ("CAP_NET_ADMIN", CapabilitySet::NET_ADMIN, "qdiscs, filters, IFBs, bridges, taps"),
    ("CAP_NET_RAW", CapabilitySet::NET_RAW, "iptables in vif scripts; packets that announce a moved guest"),
    ("CAP_IPC_LOCK", CapabilitySet::IPC_LOCK, "libxenctrl locks the buffers of hypercalls"),
    (
        "CAP_SYS_ADMIN",
        CapabilitySet::SYS_ADMIN,
        "nbd, loop and dm devices of guests' disks, which ask for nothing less",
    ),
    ("CAP_SYS_CHROOT", CapabilitySet::SYS_CHROOT, "a device model's empty root"),
    ("CAP_SYS_RESOURCE", CapabilitySet::SYS_RESOURCE, "pipes as large as they should be; state on a full file system"),
];

/// The kernel has 64 at most.
const ALL: u32 = 64;

/// Privileges could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up {what}: {source}")]
pub struct PrivilegeError {
    what: String,
    source: rustix::io::Errno,
}

fn failed(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> PrivilegeError {
    let what = what.into();
    move |source| PrivilegeError { what, source }
}

fn needed() -> CapabilitySet {
    NEEDED.iter().fold(CapabilitySet::empty(), |all, (_, capability, _)| all | *capability)
}

/// Gives up everything but [`NEEDED`], also for all children, and that any of them gets more by executing a file (setuid, file
/// capabilities). For the calling thread and those that it starts: call it while there is no other.
///
/// # Errors
/// [`PrivilegeError`]; part of it may have happened.
pub fn drop_all_but_needed() -> Result<(), PrivilegeError> {
    let keep = needed();
    let now = capabilities(None).map_err(failed("capabilities"))?;
    for bit in 0..ALL {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        // The kernel knows fewer than 64 and says EINVAL for the others.
        if keep.contains(capability) || !matches!(capability_is_in_bounding_set(capability), Ok(true)) {
            continue;
        }
        remove_capability_from_bounding_set(capability).map_err(failed(format!("capability {bit}")))?;
    }
    clear_ambient_capability_set().map_err(failed("ambient capabilities"))?;
    let kept = now.permitted & keep;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })
        .map_err(failed("capabilities"))?;
    set_no_new_privs(true).map_err(failed("new privileges"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_what_is_needed_is_left_also_to_children() {
        // Capabilities are a thread's: this one's end with it.
        let seen = std::thread::spawn(|| {
            if !capabilities(None).unwrap().effective.contains(CapabilitySet::SETPCAP) {
                return None;
            }
            drop_all_but_needed().unwrap();
            let now = capabilities(None).unwrap();
            assert!(rustix::thread::no_new_privs().unwrap());
            assert!(now.inheritable.is_empty() && needed().contains(now.effective) && now.effective == now.permitted);
            let again = remove_capability_from_bounding_set(CapabilitySet::NET_ADMIN);
            assert_eq!(again, Err(rustix::io::Errno::PERM), "SETPCAP is gone too");
            let output = std::process::Command::new("grep").args(["^Cap", "/proc/self/status"]).output().unwrap();
            Some(String::from_utf8(output.stdout).unwrap())
        })
        .join()
        .unwrap();
        let Some(status) = seen else {
            eprintln!("skipped: needs CAP_SETPCAP");
            return;
        };
        for line in status.lines() {
            let bits = u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
            assert_eq!(bits & !needed().bits(), 0, "a child has more: {line}");
        }
        assert_eq!(status.lines().count(), 5, "{status}");
    }

    #[test]
    fn the_unit_file_has_the_same_list() {
        let unit = include_str!("../../../scripts/remusd.service");
        let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
        let mut listed: Vec<_> = line.split(' ').collect();
        // The daemon needs it to give up the rest, and then gives it up.
        let at = listed.iter().position(|name| *name == "CAP_SETPCAP").unwrap();
        listed.remove(at);
        let ours: Vec<_> = NEEDED.iter().map(|(name, ..)| *name).collect();
        assert_eq!(listed, ours);
    }
}
