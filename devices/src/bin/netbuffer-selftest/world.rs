//! A guest that is a network namespace, its interface on a bridge, and a buffer in between.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use devices::netbuffer::{NetBuffer, NetBufferConfig, NetEvent, SetupScript};
use devices::{Device, DeviceSet, EpochContext, Kind, OutputWatch, Policy, output_signal};

use crate::frames::{Mark, Observer, PLAIN, Sender};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

static NEXT_DOMID: AtomicU32 = AtomicU32::new(1);

/// Runs a command line in this thread's namespace.
pub(crate) fn sh(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words).output().map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// A thread in a namespace of its own.
pub(crate) struct Guest {
    work: Option<mpsc::Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<std::thread::JoinHandle<()>>,
    namespace: String,
}

impl Guest {
    fn new() -> Result<Self, String> {
        let (work, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .map(|()| format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid()))
                .map_err(|e| e.to_string());
            let _ = ready.send(made);
            for job in inbox {
                job();
            }
        });
        let namespace = is_ready.recv().map_err(|e| e.to_string())??;
        Ok(Self { work: Some(work), thread: Some(thread), namespace })
    }

    /// Has something done in the guest's namespace.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        let job = Box::new(move || {
            let _ = answer.send(job());
        });
        self.work.as_ref().unwrap().send(job).unwrap();
        answered.recv().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.work.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Connects an interface of the guest to the bridge, as a hotplug script does.
fn connect(guest: &Guest, domid: u32, bridge: &str, vif: &str, inside: &str) -> Result<(), String> {
    sh(&format!("ip link add {vif} type veth peer name {inside} netns {}", guest.namespace))?;
    sh(&format!("ip link set {vif} master {bridge} up"))?;
    let inside = inside.to_owned();
    guest.run(move || {
        // Its kernel would send IPv6 packets of its own, which no check can count.
        let quiet = format!("/proc/sys/net/ipv6/conf/{inside}/disable_ipv6");
        std::fs::write(&quiet, "1").map_err(|e| format!("{quiet}: {e}"))?;
        sh(&format!("ip address add 10.9.{domid}.2/24 dev {inside}"))?;
        sh(&format!("ip link set {inside} up"))
    })?;
    Ok(())
}

/// The defaults, but for the patience that full emulation on a busy machine needs.
pub(crate) fn unhurried() -> NetBufferConfig {
    NetBufferConfig { request_timeout: PATIENCE, drain_timeout: PATIENCE, ..NetBufferConfig::default() }
}

fn new_set(config: NetBufferConfig) -> (DeviceSet, tokio::sync::mpsc::Receiver<NetEvent>) {
    let (events, inbox) = tokio::sync::mpsc::channel(1000);
    let netbuffer = Arc::new(NetBuffer::new(config, events));
    (DeviceSet::new(vec![netbuffer], Policy::strict()), inbox)
}

/// One guest with one vif, and the host's side of it: a bridge with an address.
pub(crate) struct World {
    pub domid: u32,
    pub vif: String,
    pub ifb: String,
    pub bridge: String,
    pub guest: Guest,
    pub observer: Observer,
    pub sender: Arc<Sender>,
    pub set: DeviceSet,
    pub events: tokio::sync::mpsc::Receiver<NetEvent>,
    seq: u32,
}

pub(crate) const fn armed(epoch: u64) -> EpochContext {
    EpochContext { epoch, armed: true }
}

impl World {
    /// Guest, bridge and an interface between them; nothing is buffered.
    pub(crate) fn new() -> Result<Self, String> {
        Self::with(unhurried())
    }

    pub(crate) fn with(config: NetBufferConfig) -> Result<Self, String> {
        let domid = NEXT_DOMID.fetch_add(1, Ordering::Relaxed);
        let bridge = format!("br{domid}");
        let guest = Guest::new()?;
        sh(&format!("ip link add {bridge} type bridge forward_delay 0"))?;
        sh(&format!("ip address add 10.9.{domid}.1/24 dev {bridge}"))?;
        sh(&format!("ip address add fd09:{domid}::1/64 dev {bridge} nodad"))?;
        sh(&format!("ip link set {bridge} up"))?;
        let vif = format!("vif{domid}.0");
        connect(&guest, domid, &bridge, &vif, "eth0")?;
        let (set, events) = new_set(config);
        Ok(Self {
            ifb: format!("rmifb{domid}.0"),
            observer: Observer::new(&bridge)?,
            sender: Arc::new(guest.run(|| Sender::new("eth0"))?),
            seq: 0,
            domid,
            vif,
            bridge,
            guest,
            set,
            events,
        })
    }

    /// Turns the guest's IPv6 on.
    pub(crate) fn enable_ipv6(&self) -> Result<(), String> {
        let domid = self.domid;
        self.guest.run(move || {
            std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "0").map_err(|e| e.to_string())?;
            sh(&format!("ip address add fd09:{domid}::2/64 dev eth0 nodad")).map(drop)
        })
    }

    /// Gives the guest another interface.
    pub(crate) fn plug_in(&self, vif: &str, inside: &str) -> Result<(), String> {
        connect(&self.guest, self.domid, &self.bridge, vif, inside)
    }

    /// A new set, as of a new protection.
    pub(crate) fn fresh_set(&mut self, config: NetBufferConfig) {
        (self.set, self.events) = new_set(config);
    }

    /// A new set that tells of held output.
    pub(crate) fn telling(&mut self) -> OutputWatch {
        let (events, inbox) = tokio::sync::mpsc::channel(1000);
        let (teller, output) = output_signal();
        let netbuffer = Arc::new(NetBuffer::new(unhurried(), events).telling(teller));
        (self.set, self.events) = (DeviceSet::new(vec![netbuffer], Policy::strict()), inbox);
        output
    }

    /// A new set whose intermediate device a script makes.
    pub(crate) fn script(&mut self, config: NetBufferConfig, script: SetupScript) {
        let (events, inbox) = tokio::sync::mpsc::channel(1000);
        let netbuffer = Arc::new(NetBuffer::new(config, events).with_script(script));
        (self.set, self.events) = (DeviceSet::new(vec![netbuffer], Policy::strict()), inbox);
    }

    pub(crate) fn device(&self, names: &[&str]) -> Device {
        Device {
            kind: Kind::Nic,
            domid: self.domid,
            devid: 0,
            names: names.iter().map(|n| (*n).to_owned()).collect(),
            params: BTreeMap::new(),
        }
    }

    pub(crate) async fn setup(&mut self) -> Result<(), String> {
        let device = self.device(&[&self.vif.clone()]);
        self.set.setup(vec![device]).await.map_err(|e| e.to_string())
    }

    pub(crate) async fn setup_and_arm(&mut self) -> Result<(), String> {
        self.setup().await?;
        self.arm().await
    }

    pub(crate) async fn arm(&mut self) -> Result<(), String> {
        self.set.arm(&armed(1)).await.map_err(|e| e.to_string())
    }

    pub(crate) async fn close(&mut self, epoch: u64) -> Result<(), String> {
        self.set.postsuspend(&armed(epoch)).await.map_err(|e| e.to_string())
    }

    pub(crate) async fn commit(&mut self, epoch: u64) -> Result<(), String> {
        self.set.commit(&armed(epoch)).await.map_err(|e| e.to_string())
    }

    pub(crate) async fn teardown(&mut self, ending: devices::Ending) -> Result<(), String> {
        match self.set.teardown(ending).await.first() {
            Some(e) => Err(e.to_string()),
            None => Ok(()),
        }
    }

    /// The guest sends `n` frames marked with `tag`.
    pub(crate) fn send(&mut self, tag: u32, n: u32) -> Result<(), String> {
        self.send_kind(PLAIN, tag, n, 60)
    }

    pub(crate) fn send_kind(&mut self, kind: &[u8], tag: u32, n: u32, len: usize) -> Result<(), String> {
        for _ in 0..n {
            self.seq += 1;
            self.sender.send(kind, Mark { tag, seq: self.seq }, len)?;
        }
        Ok(())
    }

    /// Packets held, bytes held, packets dropped, as `tc` says.
    pub(crate) fn queue(&self) -> Result<(u64, u64, u64), String> {
        let json = sh(&format!("tc -s -j qdisc show dev {}", self.ifb))?;
        let all: serde_json::Value = serde_json::from_str(&json).map_err(|e| format!("{e}: {json}"))?;
        let plug = all
            .as_array()
            .and_then(|all| all.iter().find(|q| q["kind"] == "plug"))
            .ok_or_else(|| format!("no plug on {}: {json}", self.ifb))?;
        let field = |name: &str| plug[name].as_u64().ok_or_else(|| format!("no {name}: {json}"));
        Ok((field("qlen")?, field("backlog")?, field("drops")?))
    }

    /// Waits until exactly `n` packets are held.
    pub(crate) async fn held(&self, n: u64) -> Result<(), String> {
        self.until(&format!("{n} held"), || Ok(self.queue()?.0 == n)).await.map_err(|e| match self.queue() {
            Ok((now, ..)) => format!("{e} (held: {now})"),
            Err(also) => format!("{e}, {also}"),
        })
    }

    /// Waits for a state of the kernel that no event tells of.
    pub(crate) async fn until(&self, what: &str, is: impl Fn() -> Result<bool, String>) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while !is()? {
            if Instant::now() > deadline {
                return Err(format!("waited in vain for: {what}"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Waits for the next event.
    pub(crate) async fn event(&mut self) -> Result<NetEvent, String> {
        match tokio::time::timeout(PATIENCE, self.events.recv()).await {
            Ok(Some(event)) => Ok(event),
            Ok(None) => Err("the buffer's thread has ended".into()),
            Err(_) => Err("no event".into()),
        }
    }

    /// Checks that nothing of the buffer is left.
    pub(crate) fn nothing_left(&self) -> Result<(), String> {
        if sh(&format!("ip link show {}", self.ifb)).is_ok() {
            return Err(format!("{} is left", self.ifb));
        }
        if exists(&self.vif) {
            let qdiscs = sh(&format!("tc qdisc show dev {}", self.vif))?;
            if qdiscs.contains("ingress") {
                return Err(format!("left on {}: {qdiscs}", self.vif));
            }
        }
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in [&self.vif, &self.bridge, &self.ifb, &format!("rmemu{}.0", self.domid)] {
            if exists(name) {
                let _ = sh(&format!("ip link delete {name}"));
            }
        }
    }
}

pub(crate) fn exists(interface: &str) -> bool {
    sh(&format!("ip link show {interface}")).is_ok()
}

/// Fails with words unless `is`.
pub(crate) fn ensure(is: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if is { Ok(()) } else { Err(what()) }
}
