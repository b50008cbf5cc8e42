//! Init of the test guests; see the library.

use std::time::Duration;

use xen_test_guest::boot::{self, BootError};
use xen_test_guest::protocol::Ports;
use xen_test_guest::server::{End, Servers};

/// How long the network device may take to appear.
const DEVICE_WAIT: Duration = Duration::from_secs(60);

fn main() {
    let name = std::env::args().next().unwrap_or_default();
    if std::process::id() != 1 {
        // Called by the kernel as /sbin/poweroff or /sbin/reboot.
        match name.rsplit('/').next() {
            Some("poweroff") => boot::end(End::Poweroff),
            Some("reboot") => boot::end(End::Reboot),
            _ => {
                eprintln!("this is the init of a test guest: boot a kernel with it");
                std::process::exit(2);
            }
        }
        return;
    }
    if let Err(e) = start() {
        // The console keeps the reason; whoever waits for the guest times out.
        eprintln!("guest: boot failed: {e}");
    }
    // Init must not end. Nothing reparents to it: no program is started here.
    loop {
        std::thread::park();
    }
}

fn start() -> Result<(), BootError> {
    boot::mount_all()?;
    boot::install_shutdown_helpers()?;
    boot::load_modules("order")?;
    let net = boot::network(DEVICE_WAIT)?;
    let servers = Servers::start(Ports::default(), boot::end)
        .map_err(|source| BootError::File { path: "servers".into(), source })?;
    match net {
        Some(net) => println!("guest: ready at {} and {}, {:?}", net.ip.0, net.ip6.0, servers.ports()),
        None => println!("guest: ready, without network: no guest.ip= on the kernel command line"),
    }
    Ok(())
}
