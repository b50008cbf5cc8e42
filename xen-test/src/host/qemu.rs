//! Starting, stopping and freezing the QEMU process of a host.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::qmp::Qmp;
use crate::image::{Image, short_hash};
use crate::net::NetNs;
use crate::run::{Child, start_time};
use crate::wait::wait_until;

/// A state of the machine that a reset goes back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshot {
    /// Booted, programs and test guest pushed, nothing runs.
    Ready,
    /// As [`Snapshot::Ready`], with the daemons started and a PVH guest running on host a.
    Guest,
    /// As [`Snapshot::Guest`], with the guest writing to its memory and protected towards host b, no witness, all else by default.
    Protected,
    /// As [`Snapshot::Protected`], with an etcd beside the client as the witness.
    Armed,
    /// As [`Snapshot::Ready`], with the daemons started and a PVH guest that writes to its memory and its mirrored disk, protected towards
    /// host b.
    Disk,
}

impl Snapshot {
    /// QEMU's tag.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Guest => "guest",
            Self::Protected => "protected",
            Self::Armed => "armed",
            Self::Disk => "disk",
        }
    }

    /// What it is made from.
    pub fn before(self) -> Option<Self> {
        match self {
            Self::Ready => None,
            Self::Guest | Self::Disk => Some(Self::Ready),
            Self::Protected | Self::Armed => Some(Self::Guest),
        }
    }
}

/// Largest time for saving or loading a snapshot.
const QMP_LIMIT: Duration = Duration::from_secs(180);

/// What a nested host is made of.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    /// Memory of the whole host in MiB.
    pub memory: u32,
    /// Memory of dom0 in MiB; guests get the rest, less some 250 MiB for Xen.
    pub dom0_memory: u32,
    /// Virtual CPUs of the host.
    pub cpus: u32,
    /// Start the C xenstored in place of oxenstored, Debian's default.
    pub c_xenstored: bool,
    /// More for Xen's command line.
    pub xen_arguments: String,
}

impl Default for MachineOptions {
    fn default() -> Self {
        Self { memory: 2560, dom0_memory: 1152, cpus: 1, c_xenstored: false, xen_arguments: String::new() }
    }
}

/// The hardware of one host: its disk, and its QEMU process while it is powered on.
#[derive(Debug)]
pub struct Machine {
    name: String,
    options: MachineOptions,
    image: Image,
    netns: Arc<NetNs>,
    dir: PathBuf,
    logs: PathBuf,
    qemu: Option<Child>,
    boots: u32,
    snapshots: Vec<Snapshot>,
}

/// What TCG gets wrong under nested SVM is left out: supervisor-mode access prevention, rdtscp, and XSAVE, with which SSE registers of
/// dom0 are damaged now and then while a guest runs (a checksum of a constant buffer came out wrong 3 times in 12 000; without XSAVE
/// never in 16 000) and AVX faults on more than one CPU. `XEN_TEST_CPU` overrides it, to try others.
const CPU: &str = "max,-smap,-rdtscp,-avx,-avx2,-xsave";

impl Machine {
    /// A machine that is powered off, with a fresh disk. `name` is `a` or `b`.
    pub fn new(
        name: &str,
        options: MachineOptions,
        image: Image,
        netns: Arc<NetNs>,
        dir: &Path,
        logs: &Path,
    ) -> Result<Self> {
        let mut machine = Self {
            name: name.to_owned(),
            options,
            image,
            netns,
            dir: dir.to_owned(),
            logs: logs.to_owned(),
            qemu: None,
            boots: 0,
            snapshots: Vec::new(),
        };
        let warm = machine.warm_disk()?;
        if warm.exists() {
            std::fs::copy(&warm, machine.disk()).context("cannot copy the disk of a booted host")?;
            machine.snapshots.push(Snapshot::Ready);
        } else {
            machine.fresh_disk()?;
        }
        Ok(machine)
    }

    /// Gives the machine, which is off, a disk as the image has it, without a snapshot.
    pub fn fresh_disk(&mut self) -> Result<()> {
        self.snapshots.clear();
        let _ = std::fs::remove_file(self.disk());
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .arg(self.image.root_disk())
            .arg(self.disk())
            .status()
            .context("cannot run qemu-img")?;
        if !status.success() {
            bail!("qemu-img could not create {}", self.disk().display());
        }
        Ok(())
    }

    /// Where the cache has, or could have, the disk of a host like this one, booted and with a
    /// snapshot.
    fn warm_disk(&self) -> Result<PathBuf> {
        let mut command = Command::new("qemu-system-x86_64");
        // The run's own paths and the machine's are told apart by what they are for.
        self.arguments(&mut command)?;
        let run = [self.dir.to_string_lossy(), self.logs.to_string_lossy()];
        let mut parts = vec![qemu_version()?];
        for argument in command.get_args() {
            let argument = argument.to_string_lossy();
            parts.push(argument.replace(&*run[0], "RUN").replace(&*run[1], "LOGS"));
        }
        let key = short_hash(parts.iter().map(String::as_bytes));
        Ok(self.image.dir().join(format!("warm-{}-{key}.qcow2", self.name)))
    }

    /// Keeps the booted machine in the cache: snapshot, orderly end of QEMU, copy of the disk. The
    /// machine is off afterwards, with a snapshot to start from.
    pub fn keep_warm(&mut self) -> Result<()> {
        self.save(Snapshot::Ready)?;
        let qmp = Qmp::connect(&self.monitor(), QMP_LIMIT)?;
        qmp.quit()?;
        if let Some(qemu) = &mut self.qemu {
            qemu.process().wait()?;
        }
        self.power_off();
        let warm = self.warm_disk()?;
        let part = warm.with_extension(format!("part{}", std::process::id()));
        std::fs::copy(self.disk(), &part)?;
        std::fs::rename(&part, &warm)?;
        Ok(())
    }

    /// Removes from the cache what [`Machine::keep_warm`] put there.
    pub fn forget_warm(&self) -> Result<()> {
        std::fs::remove_file(self.warm_disk()?).context("cannot remove a booted host from the cache")
    }

    fn disk(&self) -> PathBuf {
        self.dir.join(format!("{}.qcow2", self.name))
    }

    fn monitor(&self) -> PathBuf {
        self.dir.join(format!("{}.qmp", self.name))
    }

    /// The console of Xen and dom0, all boots in one file.
    pub fn console(&self) -> PathBuf {
        self.logs.join(format!("{}-console.log", self.name))
    }

    /// Powers the machine on: from a snapshot if one is given, else a boot from its disk as it
    /// was left. Returns as soon as QEMU runs. From a snapshot the machine stands still until
    /// [`Machine::go`].
    ///
    /// A snapshot is only ever loaded into a new process: `loadvm` in a living one cannot turn the
    /// time stamp counter back (QEMU keeps it from decreasing), Xen then finds it far ahead of its
    /// platform timer, and the dom0 stands still for as long as the two differ.
    pub fn power_on(&mut self, from: Option<Snapshot>) -> Result<()> {
        if self.is_on()? {
            bail!("host {} is powered on already", self.name);
        }
        if let Some(missing) = from.filter(|snapshot| !self.has(*snapshot)) {
            bail!("host {} has no snapshot '{}' yet", self.name, missing.name());
        }
        self.boots += 1;
        let mut command = Child::command("qemu-system-x86_64");
        self.arguments(&mut command)?;
        if let Some(snapshot) = from {
            command.args(["-S", "-loadvm", snapshot.name()]);
        }
        let _ = std::fs::remove_file(self.monitor());
        let errors = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.logs.join(format!("{}-qemu.log", self.name)))?;
        command.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors);
        let name = format!("QEMU of host {}", self.name);
        let child = self.netns.call(move || Child::spawn(&name, &mut command))??;
        let stamp = format!("{} {}", child.pid(), start_time(child.pid()).unwrap_or_default());
        std::fs::write(self.dir.join(format!("{}.pid", self.name)), stamp)?;
        self.qemu = Some(child);
        Ok(())
    }

    fn arguments(&self, command: &mut Command) -> Result<()> {
        let number = if self.name == "a" { 1 } else { 2 };
        let options = &self.options;
        command
            .args(["-name", &format!("xen-test-{}", self.name)])
            .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-no-reboot", "-nodefaults"])
            .args(["-cpu", &std::env::var("XEN_TEST_CPU").unwrap_or_else(|_| CPU.into())])
            .args(["-smp", &options.cpus.to_string(), "-m", &options.memory.to_string()])
            .args(["-display", "none", "-vga", "none", "-rtc", "base=utc,clock=host"]);
        command.arg("-chardev").arg(format!("file,id=console,path={},append=on", escape(&self.console())?));
        command.args(["-serial", "chardev:console"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", escape(&self.monitor())?));
        command
            .arg("-drive")
            .arg(format!("if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,file={}", escape(&self.disk())?));
        command.args(["-device", "virtio-blk-pci,drive=root"]);
        for (network, mac) in [("data", "da"), ("mgmt", "aa")] {
            let host = &self.name;
            command.arg("-netdev").arg(format!("tap,id={network},ifname={network}-{host},script=no,downscript=no"));
            command
                .arg("-device")
                .arg(format!("virtio-net-pci,netdev={network},mac=52:54:00:{mac}:00:0{number},romfile="));
        }
        command.args(["-device", "virtio-rng-pci"]);
        command.arg("-kernel").arg(self.image.hypervisor());
        command.arg("-append").arg(format!(
            "com1=115200,8n1 console=com1 dom0_mem={0}M,max:{0}M loglvl=warning \
             guest_loglvl=warning {1}",
            options.dom0_memory, options.xen_arguments
        ));
        let store = if options.c_xenstored { "xenstored" } else { "oxenstored" };
        command.arg("-initrd").arg(format!(
            "{} console=hvc0 quiet panic=-1 net.ifnames=0 xt.host={} xt.xenstored={store},{}",
            escape(&self.image.kernel())?,
            self.name,
            escape(&self.image.initramfs())?
        ));
        Ok(())
    }

    /// Whether the QEMU process runs (frozen counts as running).
    pub fn is_on(&mut self) -> Result<bool> {
        match &mut self.qemu {
            None => Ok(false),
            Some(qemu) => Ok(qemu.try_wait()?.is_none()),
        }
    }

    /// Power loss: `kill -9` of QEMU. Nothing the host had in flight gets out.
    pub fn power_off(&mut self) {
        self.qemu = None;
        let _ = std::fs::remove_file(self.dir.join(format!("{}.pid", self.name)));
    }

    /// Stops the whole host where it stands, until [`Machine::thaw`].
    pub fn freeze(&self) -> Result<()> {
        self.process()?.signal(Signal::SIGSTOP)
    }

    /// Lets a frozen host go on. Its clocks see the gap.
    pub fn thaw(&self) -> Result<()> {
        self.process()?.signal(Signal::SIGCONT)
    }

    fn process(&self) -> Result<&Child> {
        self.qemu.as_ref().with_context(|| format!("host {} is powered off", self.name))
    }

    /// Process id of QEMU, if the host is on.
    pub fn pid(&self) -> Option<i32> {
        self.qemu.as_ref().map(Child::pid)
    }

    /// How often the machine was powered on.
    pub fn boots(&self) -> u32 {
        self.boots
    }

    /// Stops the virtual CPUs and clocks; its own clocks will not see the gap.
    pub fn pause(&self) -> Result<()> {
        self.monitored("stop")
    }

    /// Lets a [paused](Machine::pause) machine, or one started from a snapshot, run.
    pub fn go(&self) -> Result<()> {
        self.monitored("cont")
    }

    /// Whether all virtual CPUs of the machine, which is [paused](Machine::pause), stand at a halt instruction. Xen halts outside of its
    /// guests; QEMU cannot load a state that was saved inside one ("vCPU set in guest-mode inconsistent with ... nested state").
    pub fn is_halted(&self) -> Result<bool> {
        let text = Qmp::connect(&self.monitor(), QMP_LIMIT)?.ask("info registers -a")?;
        ensure!(text.contains("HLT="), "QEMU shows no halt state: {text}");
        Ok(!text.contains("HLT=0"))
    }

    /// Waits until QEMU has loaded what it was started from.
    pub fn wait_loaded(&mut self) -> Result<()> {
        wait_until(QMP_LIMIT, &format!("QEMU of host {} has loaded its snapshot", self.name), || {
            ensure!(self.is_on()?, "QEMU of host {} ended: see {}-qemu.log", self.name, self.name);
            // The socket is there before the snapshot is loaded, but nobody answers yet.
            Ok(self.monitor().exists().then_some(()))
        })?;
        self.monitored("query-status")
    }

    fn monitored(&self, command: &str) -> Result<()> {
        Qmp::connect(&self.monitor(), QMP_LIMIT)?.call(command, &serde_json::json!({})).map(drop)
    }

    /// Whether there is this snapshot to go back to.
    pub fn has(&self, snapshot: Snapshot) -> bool {
        self.snapshots.contains(&snapshot)
    }

    /// Takes a snapshot that resets go back to. The host stands still meanwhile (seconds), and afterwards if it did before.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<()> {
        Qmp::connect(&self.monitor(), QMP_LIMIT)?.human(&format!("savevm {}", snapshot.name()))?;
        self.snapshots.push(snapshot);
        Ok(())
    }
}

/// First line of `qemu-system-x86_64 --version`: snapshots fit the version that took them.
fn qemu_version() -> Result<String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output().context("cannot run QEMU")?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

/// A path inside an option of QEMU, where a comma is written twice. The space-separated lists of
/// `-initrd` cannot hold every path, so those are refused.
fn escape(path: &Path) -> Result<String> {
    let text = path.to_str().context("paths of the cache must be UTF-8")?;
    if text.contains([' ', ',']) {
        bail!("{text}: QEMU cannot use a path with a space or comma; set XEN_TEST_CACHE");
    }
    Ok(text.to_owned())
}
