//! Kernel modules and what they need, out of `modules.dep`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// The modules of one kernel tree (`…/lib/modules/VERSION`).
#[derive(Debug)]
pub struct ModuleTree {
    /// Path below the tree → paths it needs, in no particular order.
    needs: BTreeMap<String, Vec<String>>,
    /// Module name (`-` as `_`) → path below the tree.
    names: BTreeMap<String, String>,
}

impl ModuleTree {
    /// Reads `modules.dep` of the tree at `root`.
    pub fn read(root: &Path) -> Result<Self> {
        let file = root.join("modules.dep");
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut tree = Self { needs: BTreeMap::new(), names: BTreeMap::new() };
        for line in text.lines() {
            let Some((path, needs)) = line.split_once(':') else {
                continue;
            };
            tree.names.insert(module_name(path), path.to_owned());
            tree.needs.insert(path.to_owned(), needs.split_whitespace().map(str::to_owned).collect());
        }
        tree
    }

    /// Paths of the named modules and of all they need, each after what it needs: the order for
    /// `insmod`. A name the tree does not have (built in, or absent) is an error.
    pub fn in_order(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            let Some(path) = self.names.get(&module_name(name)) else {
                bail!("the kernel has no module {name}");
            };
            self.visit(path, &mut seen, &mut order);
        }
        Ok(order)
    }

    fn visit(&self, path: &str, seen: &mut BTreeSet<String>, order: &mut Vec<String>) {
        if !seen.insert(path.to_owned()) {
            return;
        }
        for need in self.needs.get(path).into_iter().flatten() {
            self.visit(need, seen, order);
        }
        order.push(path.to_owned());
    }
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needed_modules_come_first_and_once() {
        let tree = ModuleTree::parse(
            "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko\n\
             kernel/fs/jbd2/jbd2.ko: kernel/lib/crc16.ko\nkernel/lib/crc16.ko:\n\
             kernel/drivers/xen-blkfront.ko:\n",
        );
        assert_eq!(
            tree.in_order(&["ext4", "crc16", "xen_blkfront"]).unwrap(),
            [
                "kernel/lib/crc16.ko",
                "kernel/fs/jbd2/jbd2.ko",
                "kernel/fs/ext4/ext4.ko",
                "kernel/drivers/xen-blkfront.ko"
            ]
        );
        assert!(tree.in_order(&["nosuch"]).is_err());
    }
}
