//! A guest with a mirrored disk, set up with the commands that an administrator has.

use anyhow::{Context, Result, ensure};
use devices::mirror::service::Status;
use xen_test_guest::protocol::{DiskInfo, DiskSpec};
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Guest, PATIENCE, Protected, listen, protect, start_daemons, wait_epochs};
use crate::client::Control;
use crate::host::{Host, Snapshot};
use crate::pair::Pair;
use crate::wait::wait_until;

/// The disk's name on both hosts.
pub const DISK: &str = "d0";
/// Where it lives.
pub const BACKING: &str = "/var/lib/remus/d0.img";
/// Its size in MiB.
const SIZE_MB: u32 = 48;
/// Records per second of the guest's writer. Emulated hosts do a few hundred at most.
const RATE: u64 = 40;

/// A PVH guest with a mirrored disk, which it writes and checks all the time, and a client that counts.
pub struct WithDisk<'p> {
    /// Guest and client.
    pub protected: Protected<'p>,
    pair: &'p Pair,
}

/// Makes the disk's service run on a host; on the one that has the contents, or as the copy.
pub fn create(host: &Host, source: bool) -> Result<()> {
    backing(host)?;
    create_on(host, BACKING, source)
}

/// Makes the file that a disk lives on.
pub fn backing(host: &Host) -> Result<()> {
    // Pages that stay mapped in dom0 are written behind the log of dirty pages (docs/disks.md).
    host.sh("echo 0 >/sys/module/xen_blkback/parameters/feature_persistent")?;
    host.sh(&format!("mkdir -p /var/lib/remus && truncate -s {SIZE_MB}M {BACKING}")).map(drop)
}

/// As [`create`], on a device or file that is there, or with `--above DEVICE`.
pub fn create_on(host: &Host, backing: &str, source: bool) -> Result<()> {
    let peer = if host.name() == "a" { "hostb" } else { "hosta" };
    // Plain TCP leads to the disk's service, as port 7788 does to the daemon: emulated ciphers are slow.
    serve_link(host)?;
    let role = if source { "--source" } else { "" };
    host.sh(&format!(
        "remus disk create {DISK} {backing} --nbd 0 --capacity 32 --via 'exec socat -b 262144 - TCP:{peer}:7789' {role}"
    ))
    .map(drop)
}

/// Has a plain TCP port lead to the disk's service.
pub fn serve_link(host: &Host) -> Result<()> {
    listen(host, 7789, &format!("/run/remus/disk/{DISK}.peer"))
}

/// Starts the disk's service again, as the unit does: after a boot of the host, or after it was killed.
pub fn serve(host: &Host) -> Result<()> {
    serve_link(host)?;
    host.sh(&format!(
        ". /etc/remus/disk/{DISK}.env; mkdir -p /var/log/remus; \
         setsid --fork remus-disk serve {DISK} --backing \"$BACKING\" --above \"$ABOVE\" --meta \"$META\" --nbd \"$NBD\" --via \"$VIA\" \
         --capacity \"$CAPACITY\" --journal-size \"$JOURNAL_SIZE\" >>/var/log/remus/disk-{DISK}.log 2>&1 </dev/null"
    ))?;
    wait_until(PATIENCE, "the disk's service answers", || {
        Ok(host.run(&format!("remus disk status {DISK}"))?.ok().then_some(()))
    })
}

/// How the disk is on a host.
pub fn disk(host: &Host) -> Result<Status> {
    let text = host.sh(&format!("remus --json disk status {DISK}"))?;
    let mut rows: Vec<Status> = serde_json::from_str(&text).with_context(|| format!("remus disk status: {text}"))?;
    rows.pop().context("one row")
}

/// Waits until the disk is as wanted.
pub fn wait_disk(host: &Host, what: &str, is: impl Fn(&Status) -> bool) -> Result<Status> {
    wait_until(PATIENCE, &format!("disk of host {}: {what}", host.name()), || {
        Ok(Some(disk(host)?).filter(|status| is(status)))
    })
}

impl<'p> WithDisk<'p> {
    /// Starts daemons and disk services, makes the guest on host a, and lets it write.
    pub fn start(pair: &'p Pair) -> Result<Self> {
        start_daemons(pair)?;
        create(pair.b(), false)?;
        create(pair.a(), true)?;
        // A later power loss takes back what was not synced of the hosts' own files.
        pair.each(|host| host.sh("sync").map(drop))?;
        Self::on(pair, &format!("phy:/dev/remus/{DISK},xvda,w"))
    }

    /// As [`WithDisk::start`], and protects it; returns after a few armed epochs. From [`Snapshot::Disk`] it is the one that is there.
    pub fn protected(pair: &'p Pair) -> Result<Self> {
        let made = if pair.take_if(Snapshot::Disk) {
            let disks = vec![format!("phy:/dev/remus/{DISK},xvda,w")];
            let guest = Guest::meet(pair, GuestSpec { disks, ..GuestSpec::new(Kind::Pvh) })?;
            Self { protected: Protected::writing(guest)?, pair }
        } else {
            let made = Self::start(pair)?;
            protect(pair.a(), "guest", "")?;
            made
        };
        wait_epochs(pair.a(), "guest", 4)?;
        Ok(made)
    }

    /// Makes the guest on host a with this disk, and lets it write. The daemons run, and both hosts have the disk.
    pub fn on(pair: &'p Pair, disk: &str) -> Result<Self> {
        let disks = vec![disk.to_owned()];
        let guest = Guest::create(pair, pair.a(), GuestSpec { disks, ..GuestSpec::new(Kind::Pvh) })?;
        let made = Self { protected: Protected::of(guest)?, pair };
        made.go_on()?;
        Ok(made)
    }

    /// How far the guest's writer is. Fails if the guest has ever found its disk other than it left it.
    pub fn written(&self) -> Result<DiskInfo> {
        sound(self.protected.guest.ask(Control::disk_read)?)
    }

    /// Has the guest read back all that it wrote.
    pub fn check(&self) -> Result<DiskInfo> {
        sound(self.protected.guest.ask(Control::disk_verify)?)
    }

    /// Waits until so many records more are complete.
    pub fn writes(&self, more: u64) -> Result<DiskInfo> {
        let from = self.written()?.completed;
        wait_until(PATIENCE, &format!("{more} more records on the guest's disk"), || {
            Ok(Some(self.written()?).filter(|info| info.completed >= from + more))
        })
    }

    /// Has the guest stand still with its disk, or go on.
    pub fn rate(&self, rate: u64) -> Result<DiskInfo> {
        let spec = DiskSpec { device: "/dev/xvda".into(), rate };
        sound(self.protected.guest.ask(move |c| c.disk_start(spec))?)
    }

    /// At the usual rate.
    pub fn go_on(&self) -> Result<()> {
        self.rate(RATE).map(drop)
    }

    /// Fails unless connection, memory and disk of the guest are whole and all three go on.
    pub fn goes_on(&self) -> Result<()> {
        self.protected.goes_on()?;
        self.check()?;
        self.writes(20)?;
        self.check().map(drop)
    }

    /// Fails unless both hosts' backing files hold the same bytes. Nothing must be writing.
    pub fn alike(&self) -> Result<()> {
        let sum = |host: &Host| host.sh(&format!("sync; sha256sum < {BACKING}"));
        let (a, b) = (sum(self.pair.a())?, sum(self.pair.b())?);
        ensure!(a == b, "the disks differ: {a} on host a, {b} on host b");
        Ok(())
    }

    /// Waits until the source on this host has nothing left to send, and nothing is under way.
    pub fn settled(&self, host: &Host) -> Result<()> {
        wait_disk(host, "the copy has all of it", |s| s.connected && s.in_sync && s.dirty == 0).map(drop)
    }
}

fn sound(info: DiskInfo) -> Result<DiskInfo> {
    ensure!(info.failed == 0, "the guest found its disk wrong {} times: {:?}", info.failed, info.complaints);
    Ok(info)
}
